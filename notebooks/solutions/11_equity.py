# %%
answer = 63  # solution
if answer is not ...:
    assert stats.pearson_p(0.25, answer) < 0.05 <= stats.pearson_p(0.25, answer - 1), "not the smallest n"
