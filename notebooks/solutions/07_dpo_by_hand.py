answer = 0.2384  # solution
if answer is not ...:
    start, now = (torch.sigmoid(torch.tensor(-m)).item() for m in (0.0, 2.0))
    assert abs(answer - now / start) < 0.005, "the weight is sigmoid(-margin): one half at the start"
