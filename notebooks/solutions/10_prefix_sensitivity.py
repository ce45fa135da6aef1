# %%
answer = ("unseen_wrong", "unseen_removed")  # solution
if answer is not ...:
    assert set(answer) == {"unseen_wrong", "unseen_removed"}, "a wrong prefix against none, same adapter"
