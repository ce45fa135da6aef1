answer = ("rejected", "chosen")  # solution
if answer is not ...:
    assert answer == ("rejected", "chosen"), "mean: -2.0 against -1.8; sum: 20 * -2.0 against 30 * -1.8"
