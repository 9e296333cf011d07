"""Microbenchmarks: packed layers against torch's own in the same run, beside what the machine could do at best.

A file is a subject: `gemm`, `gptq`, `blocks`, `decode`. Each yields rows, plain dictionaries that `record.append`
writes as JSON lines and `roofline` draws. `timing` says how a time is taken, `setting` under which conditions.
"""
