"""The studio: a page on this machine that shows a folder of runs, also while they are written.

Run folders are its only state, and it writes nothing there but what a chat's page asks it to keep (answers that were
rated). `places` turns names into paths that stay inside the given folders. `watch` follows files that grow. `runs`,
`studies`, `batch` and `rows` read what a page shows, as plain data. `chat` holds one model at a time, and gives it back
when nobody asks. `app` has the routes, and `static/` the page.
"""
