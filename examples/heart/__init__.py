"""Four hospitals train one model of heart disease."""
