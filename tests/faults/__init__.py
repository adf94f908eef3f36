"Faults from outside: the project's own commands, killed, starved and cut off at random moments, and what stands afterwards."
