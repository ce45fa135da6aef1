# %%
answer = 2  # solution
if answer is not ...:
    labels = np.full((8, len(directions.space())), directions.NEUTRAL)
    labels[:, 1] = 1  # another dimension is clear: no single one is taken for being the most extreme
    labels[:answer, 0] = 1
    enough = directions.average(labels)[0] == 1
    labels[answer - 1, 0] = directions.NEUTRAL
    assert [enough, directions.average(labels)[0] == 1] == [True, False], "the mean of eight has to reach .6"
