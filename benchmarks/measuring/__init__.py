"""Takes the times: of operators and of whole models, by several providers in turn, checked against the reference."""
