"""Plan documents: what plan.json holds, declared once, read in one place, names of earlier versions still understood."""
