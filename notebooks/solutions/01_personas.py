answer = sum(len(set(a) & set(b)) for i, a in enumerate(personas["axes"]) for b in personas["axes"][:i])  # solution

if answer is not ...:
    sizes_of_axes = members["axes"].value_counts()
    assert answer == (sizes_of_axes * (sizes_of_axes - 1) // 2).sum(), "count each axis' pairs, then add"
