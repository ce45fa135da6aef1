# %%
cells = ("mt tag divergent", "mt none divergent")  # solution: two cells, "method prefix kind" each
if cells is not ...:
    mine = claims.Claim("mine", "A tag is within .05 of no prefix.", "me", "gap", side=(-0.05, 0.05), cells=cells)
    found = claims.MEASURES[mine.measure](claims.Bench(scores, personas, cfg), mine.cells)
    assert set(cells) == {"mt tag divergent", "mt none divergent"}, "unseen people's divergent questions, both trained"
    print(f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]: {claims.verdict(found, mine)}")
