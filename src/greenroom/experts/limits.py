"""Numbers that computing experts and planning it must agree on; without torch, as planning is."""

# Of a group of experts computed at a time, and no more than tokens; bounds scratch. Of 8192 tokens
# four experts of gpt-oss get about 4096 rows: a little more, so that most pages are one group.
EXPERT_ROWS = 4608
FEW_ROWS = 128  # of an expert, on average: with more, expanding its matrices first is faster
BESIDE_STAGED = 16  # bytes a layer's expert takes in the table of those that are staged
