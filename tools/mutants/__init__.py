"""Mutation testing of ``kvmbook/model``: small mistakes are put into the model, one at a time; who notices?

`mutating` makes the mistakes with cosmic-ray, `running` runs tests or a chapter on one of them in a forked process, `scoring`
says what was found. ``python -m tools.mutants --help`` tells the rest. See `mutating` for why cosmic-ray.
"""
