"Cheats that happened and honest predictors, for the auditor. `expected.json` says what must catch each."
