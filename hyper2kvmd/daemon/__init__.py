"""`hyper2kvmd run`: what it watches, the jobs that it starts, and how it is seen to do."""
