answer = -int(-megabytes["base"] // megabytes["one adapter"])  # solution
if answer is not ...:
    as_heavy = [n for n in range(1, 100_000) if n * megabytes["one adapter"] >= megabytes["base"]]
    assert answer == as_heavy[0], "the smallest whole number whose adapters weigh as much as the base"
