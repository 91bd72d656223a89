"""The contract: what every op means, apart from who computes it (`parcnn.cpu`, `parcnn.cuda`) and when (`parcnn.plan`)."""
