"""Data sets from the internet, for people who ask for one: the only code that opens a connection to fetch data."""
