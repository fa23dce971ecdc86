"""The share of digits in an answer."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **named):
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
