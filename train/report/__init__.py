"""A page that compares runs: ``gather`` reads them, ``page`` lays them out, ``record`` draws them.

gather.py    runs and their arms; curves by arm; what the tables hold
curves.py    means over runs, extremes over layers, thinned for drawing
tables.py    tables as HTML
figures.py   arms side by side, as plotly figures
detail.py    one run: every head over the steps, norm ratios by layer
page.py      one HTML file that needs no network; page.css, page.js
record.py    the same curves through matplotlib, as PNG and SVG
"""
