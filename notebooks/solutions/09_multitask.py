answer = -math.log(math.expm1(0.5)) / t.beta  # solution
if answer is not ...:
    loss = math.log1p(math.exp(-t.beta * answer))
    assert abs(loss - 0.5) < 0.005, f"a loss of {loss:.3f}; solve -log sigmoid(beta * m) = 0.5 for m"
