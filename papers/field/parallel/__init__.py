"""What people measured on many devices at once, predicted from the facts they stated, and scored.

rows        one figure: read, checked
routing     expert loads that resemble those of published recordings
setup       a figure becomes machine, model, schedule and one step's load
serving     steps of whole servers and clusters, and what a server makes of them
operations  single kernels and exchanges
differences ratios of two runs
predict     every kind of figure by its way
scores      per kind and cut, in the shape of the reports on one box.
"""
