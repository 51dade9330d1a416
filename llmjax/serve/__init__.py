"""A server that clients of OpenAI's interface speak to, and a page to chat with the model.

`command` is the verb, `models` opens runs, `http` runs the server and ends it, `guard` looks at every request first, and
`app` has the routes. An endpoint reads its request (`messages` for JSON and types, `fields` for sampling), takes a place (`admission`), and
hands the texts to write to the thread that owns the engines (`worker`). `tickets` brings the news back, `choices` makes
deltas of them (`tools` parses calls, `log_probs` writes log-probabilities), and the endpoint puts them in its form:
`chat`, `completions`, `responses`. `vectors` has embeddings and ranking, and `documents` questions to files. `models` opens
runs with their adapters, `openapi` describes the interface, and `static/` is the page.
"""
