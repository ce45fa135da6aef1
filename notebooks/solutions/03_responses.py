by_question = scored.groupby("question_id")["reward"].median()  # solution
in_span = scored[scored["in_span"]].groupby("question_id")["reward"].median()  # solution
answer = (in_span > by_question).mean()  # solution

if answer is not ...:
    middle = scored.groupby("question_id")["reward"].median()
    above = scored[scored["in_span"]].groupby("question_id")["reward"].median() > middle
    assert abs(answer - above.mean()) < 0.01, f"found {answer}, expected {above.mean():.2f}"
