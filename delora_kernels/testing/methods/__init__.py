"""Every method of functional/ and every convention of it as random problems; `table.py` lists
them.
"""
