from django.urls import include, path

from tests.support.django_project.bank import views

ATOMIC = [path("<name>/", views.deposit)]
EXEMPT = [*ATOMIC, path("exempt/<name>/", views.exempt_deposit)]

urlpatterns = [path("", include(EXEMPT))]
