texts = questions[questions["kind"] == "personal"].assign(words=lambda t: t["text"].map(people.normalised))  # solution
answer = texts.drop_duplicates(["words", "persona_id"])["words"].value_counts().gt(1).sum()  # solution

if answer is not ...:
    own = questions[questions["kind"] == "personal"]
    askers = own.groupby(own["text"].map(people.normalised))["persona_id"].nunique()
    assert answer == (askers > 1).sum(), f"found {answer}, expected {(askers > 1).sum()}"
