"""Comparison of runs: tables as the paper has them, paired tests, curves, changed requests.

`runs` reads run folders and `labels` says what each is, `scores` makes the cells of Tables 2, 4 and
5, `improvement` Table 3, `differences` the paired tests, `curves` the metrics over edits, `changes`
what became of single requests, `paper` the published numbers; `grids` writes a table in any format,
`command` puts everything into a folder.
"""
