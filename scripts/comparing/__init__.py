"""Ways to train together, compared: by whole trainings (``comparison``), or by speed (``speed``).

What is asked for is a list of jobs (``result.Job``, ``plan``, ``speed_plan``), each a contender's
turn (``contender``). A launcher runs them (``running``): in workers forked from this process, on
emulated hosts, or in those that torchrun or SLURM started (``clusters``, ``agent``). What a worker
does is in ``work``, with tests on the way in ``watching``, and in ``speed_job`` where only speed is
measured. What jobs found are results (``result.Result``), which are stored (``store``), gone on
with (``ledger``) and told (``table``, ``summary``, ``speed_report``).
"""
