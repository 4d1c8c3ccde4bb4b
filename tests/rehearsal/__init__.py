"""The documented commands on full-size models with random weights: what they take, beside what the dry run says.

    make rehearsal                                # or: python -m tests.rehearsal
    make rehearsal ONLY="vlm sdxl"                # some of the models
    make rehearsal KEEP=1                         # models and runs stay in build/rehearsal
    make rehearsal DRY=1                          # tiny models: only whether it works

The weights are drawn and written tensor by tensor, in the layouts and dtypes of the published models, one model at a
time: it takes 0.5 to 21 GB of disk, which is said before, and another time as much for a merged copy where there is
room. Each command is a process of its own, whose memory is polled. The numbers of a model in rehearsal.json and
rehearsal.md of tests/benchmarks/results/<machine>/ are replaced, command by command: a run that is cut leaves what it
has measured. Exit code: 0 done, 1 a command failed, 2 there is no room for a model.
"""
