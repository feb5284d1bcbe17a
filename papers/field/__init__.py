"""What people measured on machines of their own, predicted from the facts they stated, and scored.

rows        one report: read, checked, what is not stated assumed and named
setup       a report becomes machine, engine, model, schedule and recording
predict     the same prediction as everywhere, and the two one-liners beside it
own         what one person measured: lines of a benchmark tool instead of reports
scores      per kind and cut: error, bias, coverage, order.
"""
