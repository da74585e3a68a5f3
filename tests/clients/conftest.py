from tests.system.conftest import demo_folder

__all__ = ["demo_folder"]
