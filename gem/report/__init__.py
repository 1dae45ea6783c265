"""`gem report`: a run, a file of scores or a calibration as one HTML page that needs nothing else.
records.py reads the files, charts.py draws, page.py writes; template.html.j2, page.css and page.js are the page."""
