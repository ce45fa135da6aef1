own_shots = shots[(shots["prefix"] == "few_shot") & (shots["variant"] == "main")]
personal_shots = (pair.loc[own_shots["shots"], "kind"] == "personal").to_numpy()  # solution
answer = pd.Series(personal_shots).groupby(own_shots["persona_id"].to_numpy()).all().mean()  # solution

if answer is not ...:
    personal = pair.loc[own_shots["shots"], "kind"] == "personal"
    silent = personal.groupby(own_shots["persona_id"].to_numpy()).all()
    assert abs(answer - silent.mean()) < 0.005, f"found {answer}, expected {silent.mean():.2f}"
