"""HTTP: requests in, answers out.

`access` says who may, `middleware` does what holds for every request. `bodies` reads what is sent and `answers` shows
what is sent back, of which `examples` are in the description; `tensors` are those of the v2 protocol. A module of
routes each is for inspections, galleries, health, the v2 protocol, Label Studio, and the page, whose files are in
`templates`. `app`, beside this folder, puts them together.
"""
