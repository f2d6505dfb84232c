"""What a few minutes of a GPU decide: `python -m benchmarks.gpu right | figures | layers | tune`.

right.py     every op and method against float64, in as many processes as there are cores
figures.py   the library's GEMMs, and each launch of ours beside its estimate, by what is lost
layers.py    whole layers beside their rivals, one whole model
ready.py     compiles what they will launch, in parallel, before they begin
rows.py      a table that is on the disk after every row
"""
