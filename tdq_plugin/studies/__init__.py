"""A study is many recipe runs and what follows from them. Needs the `recipes` extra.

`definition` says which runs, `execution` does them, `results` reads what they left, and `report`
turns that into tables, figures and sentences.
"""
