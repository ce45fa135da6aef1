# %%
answer = 60  # solution
if answer is not ...:
    low = ranking.wilson(answer, 100)[0]
    assert low > 0.5 >= ranking.wilson(answer - 1, 100)[0], f"{answer} wins: the interval begins at {low:.3f}"
