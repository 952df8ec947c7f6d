"""Numbers that computing experts and planning it must agree on; without torch, as planning is."""

# Of a group of experts computed at a time, and no more than tokens; bounds scratch. Of 8192 tokens
# four experts of gpt-oss get about 4096 rows: a little more, so that most pages are one group.
EXPERT_ROWS = 4608
FEW_ROWS = 128  # of an expert, on average: with more, expanding its matrices first is faster
SHORT_STEP = 32  # tokens; longer steps stream experts
STREAMED = 16  # bytes an expert takes in the table of who is computed when in a long step
# The same, and in the tables of who comes over the bus in short ones.
BESIDE_STAGED = STREAMED + 4 * (SHORT_STEP + 1)
