from .model import small_model  # noqa
from .tasks import addition_tasks  # noqa
