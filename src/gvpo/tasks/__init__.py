"""Sets of problems with checkable answers: where they are, how a model is asked, and whether training saw the tests."""

from gvpo.tasks.problems import Problem as Problem
from gvpo.tasks.registry import SUITES as SUITES
from gvpo.tasks.registry import TASKS as TASKS
from gvpo.tasks.registry import Task as Task
from gvpo.tasks.registry import load_problems as load_problems
from gvpo.tasks.registry import task_labels as task_labels
from gvpo.tasks.templates import TEMPLATES as TEMPLATES
from gvpo.tasks.templates import prompt_rows as prompt_rows
