"""Room ``sweep``: which alpha? Prompts, answers, measures of answers, the rule, and what a sweep leaves.

Knows vLLM's server by its HTTP interface only; the engine is started and told its alpha by the command line.
"""
