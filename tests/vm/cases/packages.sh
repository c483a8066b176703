# Packages under the unit, with its umask and all that it forbids: found by the image's own apt in an archive of this machine's,
# installed without network.

case_a_package_is_installed() {
    mkdir -p archive/greeter/DEBIAN archive/greeter/usr/bin
    printf '%s\n' 'Package: greeter' 'Version: 1.0' 'Architecture: all' 'Maintainer: Tests <tests@casemate.example>' \
        'Description: a test' >archive/greeter/DEBIAN/control
    printf '#!/bin/sh\nid -u >/etc/greeter\n' >archive/greeter/DEBIAN/postinst
    printf '#!/bin/sh\necho greetings\n' >archive/greeter/usr/bin/greet
    chmod 755 archive/greeter/DEBIAN/postinst archive/greeter/usr/bin/greet
    (
        cd archive
        dpkg-deb --root-owner-group --build greeter greeter_1.0_all.deb >/dev/null
        {
            dpkg-deb --field greeter_1.0_all.deb
            echo "Filename: ./greeter_1.0_all.deb"
            echo "Size: $(stat --format %s greeter_1.0_all.deb)"
            echo "SHA256: $(sha256sum greeter_1.0_all.deb | cut -d' ' -f1)"
        } >Packages
        printf 'Date: %s\nSHA256:\n %s %s Packages\n' "$(date --utc --rfc-email)" "$(sha256sum Packages | cut -d' ' -f1)" \
            "$(stat --format %s Packages)" >Release
    )
    # Where the image's sources.list looks.
    busybox httpd -f -p 127.0.0.1:8090 -h "$PWD/archive" &
    RELEASE=debian environment packaged '[system]' 'packages = ["greeter"]'
    equal "umask of the daemon" "$(sed -n 's/^Umask:\t//p' "/proc/$(daemon)/status")" 0077
    equal "the program" "$(casemate exec packaged -- greet)" greetings
    equal "who ran its script" "$(casemate exec packaged -- cat /etc/greeter)" 0
    equal "packages that are broken" "$(casemate exec --root packaged -- dpkg --audit)" ""
    contains "the lock" "$(cat ~/packaged/casemate.lock)" http://127.0.0.1:8090/./greeter_1.0_all.deb
    casemate destroy packaged
    kill $!
}
