"""What a run finds for a query, and why: in a notebook (`Explorer`) and without one (`Gallery`)."""

from xclip_lab.explorer.gallery import Gallery as Gallery
from xclip_lab.explorer.gallery import QueryError as QueryError
from xclip_lab.explorer.gallery import open_gallery as open_gallery
from xclip_lab.explorer.settings import Settings as Settings
from xclip_lab.explorer.settings import rescored as rescored
from xclip_lab.explorer.settings import trained_settings as trained_settings
from xclip_lab.explorer.widgets import Explorer as Explorer
