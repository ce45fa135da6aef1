# %%
answer = 0  # solution
if answer is not ...:
    pair = {"user": "ann", "prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
    swapped = pair | {"chosen": "No.", "rejected": "Yes."}
    (folder / "swapped.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps(swapped))
    assert answer == imported.scan(folder / "swapped.jsonl", min_pairs=1).good.sum(), "nothing says which of them is right"
