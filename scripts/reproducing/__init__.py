"""The paper's findings, repeated: studies are comparisons, whose results are judged and shown.

``evidence`` finds what studies ran, ``findings`` says what the paper found and when that counts as
confirmed, ``figures`` draws, ``page`` writes it all.
"""
