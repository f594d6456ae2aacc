// Only `stiefel atlas --watch` serves this: loads the page anew when it says something else.
(function () {
  var own = document.currentScript.dataset;
  var source = new EventSource("/-/events?page=" + encodeURIComponent(own.page));
  source.addEventListener("message", function (event) {
    if (event.data !== own.version) {
      source.close();
      location.reload();
    }
  });
  addEventListener("pagehide", function () { source.close(); });
})();
