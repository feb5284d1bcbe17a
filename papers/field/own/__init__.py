"""A person's own measured speeds beside predictions, and what they say of the machine.

lines      a file's lines become predictions; the machine after them
machine    engine, back end, card and processor: named and stated
model      which model a line is of, how its weights are stored
placement  where its experts were.
"""
