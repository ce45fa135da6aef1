last = comparisons[comparisons["round"] == 3].merge(preferences, on=["persona_id", "question_id"])  # solution
finalists = last[["response_a", "response_b"]].eq(last["rejected_id"], axis=0)  # solution
answer = finalists.any(axis=1).mean()  # solution

if answer is not ...:
    last = comparisons[comparisons["round"] == 3].merge(preferences, on=["persona_id", "question_id"])
    share = ((last["rejected_id"] == last["response_a"]) | (last["rejected_id"] == last["response_b"])).mean()
    assert abs(answer - share) < 0.005, f"found {answer}, expected {share:.3f}"
