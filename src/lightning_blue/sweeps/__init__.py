"""Sweeps: the product of axes, each combination a run in its own folder.

`sweep_file` reads the axes, `planned` says which run each combination is, by its configuration and
its `local_files`, `shared` what runs have in common, `tasks` is one process, `launch` starts them
on this machine and `slurm` on a cluster, `command` puts it together.
"""
