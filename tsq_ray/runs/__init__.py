"""Output folders, chiefly the run folder of `tsq extract` and `tsq score`.

`done` reads the parts of a run folder and `folder` writes them; `identity` decides whether two runs
do the same work; `lease` keeps a second writer out; `bulk` is one run from its first row to
`_run.json`; `verify` checks a finished run; `tables` reads its rows.
"""
