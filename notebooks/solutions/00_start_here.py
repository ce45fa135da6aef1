# %%
answer = 3 * 10 * n.axes * (cfg.questions.personal + cfg.questions.divergent)  # solution
if answer is not ...:
    right = 3 * 10 * n.axes * (cfg.questions.personal + cfg.questions.divergent)
    assert answer == right, "three comparisons for each question of each person"
    print("Right: comparisons grow with people; divergent questions do not, an axis shares them.")
