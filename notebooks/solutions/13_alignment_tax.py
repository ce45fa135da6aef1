answer = 21  # solution
if answer is not ...:
    refusal, comply, shorter = -2.5 * 8, -1.0 * answer, -1.0 * (answer - 1)
    assert comply < refusal <= shorter, "the smallest length whose sum lies below the refusal's"
